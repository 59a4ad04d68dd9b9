"""The knowledge of the field for people: the matrix of techniques and resources, and the card of one method."""
