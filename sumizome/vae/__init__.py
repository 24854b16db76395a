"""Finetuning a VAE's decoder: crops, losses, measures, and putting the result into a model. Source: report §4.4."""
