"""Trains and measures the embedded model of ``plphp.demo``."""
