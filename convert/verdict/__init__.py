"""Will an engine load this artefact: facts of the artefact, rules read in the engines' own code, and the judgement."""
