"""Evaluations of a frozen backbone: k-NN, logistic regression and linear probes.

`knn`, `log_regression` and `linear` are commands of their own; `setup` loads the model, `features` runs it over a
dataset, `metrics` computes accuracies, `results` writes one JSON file per evaluation.
"""
