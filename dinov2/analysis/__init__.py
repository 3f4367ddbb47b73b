"""PCA, shifted inference and quality statistics of features: functions of tensors, independent of models and runs."""
