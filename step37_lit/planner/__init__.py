"""What a run needs before it starts: memory of each rank, operations, traffic, layouts that fit.

`weights` and `activations` are the tables, `memory` the peak of a stage, `communication` and `estimate` the time of a
step, `balance` the layers of each pipeline stage, `search` the layouts, `command` the command line.
"""
