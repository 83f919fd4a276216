"""How the embedded model of ``plphp.demo`` is made, and how it is measured."""
