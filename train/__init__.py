"""Training: the drafter's curriculum (`python -m train`), and a small target from text (`train.pretrain`)."""
