"""Training in four stages: the table (`stages`), the run (`loop`), its data (`stream`) and its weights (`weights`)."""
