"""Names that scripts for other tools import, each a thin cover over this package's own."""
