"""Who holds what, and who serves whom. Pure: values and time in, decisions out."""
