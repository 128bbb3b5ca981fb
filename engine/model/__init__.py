"""The one definition of the network, its families, its weights and the files they come from."""
