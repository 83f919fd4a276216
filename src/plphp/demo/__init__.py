"""A small vision-language model that comes with the package, and pictures to ask it about."""
