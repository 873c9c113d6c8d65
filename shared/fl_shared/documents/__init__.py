"""What coordinator and site say to each other, signed: run spec, order, receipt, refusal, plan question and answer."""
