"""How nbval's failures read: the first wrong cell of a notebook fails, and the cells after it say so."""
