"""What a traced graph computes, found by its structure, and how new nodes are written into it."""
