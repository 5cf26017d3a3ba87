"""AlpacaEval, MT-Bench, and the results of many runs."""
