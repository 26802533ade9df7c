"""Representation alignment: which layers, what weights, which loss, when."""
