"""Work that several processes or machines share, on Ray Data."""

from plphp.cluster.pool import Lost, Pool, blocks_of, share

__all__ = ["Lost", "Pool", "blocks_of", "share"]
