"""The ops in plain PyTorch: oracle of the tests and the path taken where no kernel runs. Imports torch alone."""
