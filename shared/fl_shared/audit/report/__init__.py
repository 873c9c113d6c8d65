"""Privacy statements: `facts` from the ledger, `words` that hold for every site, one page model, two renderings."""
