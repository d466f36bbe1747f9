"""dude: fine-tune causal language models with SVD-initialised magnitude-direction adapters."""

__version__ = "0.1.0"
