"""The data that ships with the package: a part of Fashion-MNIST (MIT licence, see LICENSE-fashion-mnist)."""
