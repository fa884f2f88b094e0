"""SFT, reward models, DPO and KTO as runs: labelled texts in, a model out."""
