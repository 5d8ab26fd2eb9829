"""Everything that knows megatron-core's parallel state: layouts, processes, layer parts, strategy and optimizer."""
