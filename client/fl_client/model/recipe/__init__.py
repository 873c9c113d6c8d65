"""The recipe of the shipped base model `tiny`: corpus, tokenizer, pretraining, report."""
