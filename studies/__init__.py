"""Five questions that the report leaves open, each answered by training a tiny model several times over.

A study is a table of arms, each run with the same seeds and the same number of pictures, by Sumizome's own trainer and
samplers. `python -m studies` runs what has not been run yet and writes a page a study; it can be stopped at any time.
"""
