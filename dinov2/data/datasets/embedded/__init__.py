"""The data that ships with the package: a part of Fashion-MNIST (MIT license, see LICENSE-fashion-mnist)."""
