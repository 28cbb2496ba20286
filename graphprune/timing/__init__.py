"""What takes how long: whole models against each other, and every operator that a cut may leave, once per machine."""
