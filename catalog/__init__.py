"""A catalog of 3D objects: rows of answers and facts, as a table or a gallery."""
