import sys
from pathlib import Path

from saved import write

write(Path(sys.argv[1]))
