"""PCA, shifted inference, feature statistics and k-NN of patches: functions of tensors, independent of models."""
