"""Hub folders: `config.json`, the name table of the weights, and loading."""
