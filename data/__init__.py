"""Training data: conversations about point clouds, in the files of the PointLLM release, in tables, or packed."""
