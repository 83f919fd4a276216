"""Divides work among several processes or machines, with Ray Data."""

from plphp.cluster.pool import Lost, Pool, blocks_of, share

__all__ = ["Lost", "Pool", "blocks_of", "share"]
