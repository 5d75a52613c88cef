"""Training of MiniGPT-3D in four stages: the table (`stages`), the data (`data`), the weights (`weights`), the loop (`train`)."""
