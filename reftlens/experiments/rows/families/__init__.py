"""The families of data sets: commonsense, arithmetic, instruction following, language understanding."""
