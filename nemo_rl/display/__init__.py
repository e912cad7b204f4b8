"""How a run is shown: in a terminal and in a notebook."""
