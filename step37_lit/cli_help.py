"""The overview of the command line, as text: it must not wait for torch."""

HELP = """\
usage: python -m step37_lit {fit,validate,test,predict} --config RECIPE [--section.field VALUE ...]
       python -m step37_lit {shard,index,caption,checkpoint,convert,replay,report,plan} ...

Step-3.7, a vision-language model, on megatron-core in PyTorch Lightning.

subcommands:
  fit        train; logs, checkpoints and pictures go below --trainer.default_root_dir
  validate   loss and attribute accuracy of a checkpoint on the validation splits
  test       the same on the test splits
  predict    most likely next tokens for the prediction data
  shard      write webdataset shards from Flickr8k, COCO, chat JSONL, a folder of pictures or scenes
  index      index shards, so that epochs can be planned; add token lengths for a recipe
  shard --inspect SHARDS --config RECIPE   a page about shards and the packs that are made of them
  caption    captions of pictures by a run, a checkpoint or a hub folder
  checkpoint verify, list, show or prune the checkpoints of a run
  convert    a hub folder to a checkpoint, and back
  replay     a step that a run stopped at, NaN or a spike, once more on one process
  report     one page about a run: curves, stages, captions side by side (fit writes it at its end)
  plan       memory of each rank, operations, traffic, and the layouts that fit a number of GPUs

often used:
  --config recipes/scenes_tiny.yaml   a recipe, with its `base`; later files and options override earlier ones
  --resume must|auto|never            fit goes on from the run's newest good checkpoint (auto: where there is one)
  --ckpt_path FOLDER                  resume (fit) or evaluate (validate, test, predict) this checkpoint
  --trainer.max_steps N               optimizer steps
  --trainer.default_root_dir DIR      where every file of the run goes
  --trainer.devices N                 processes; with --trainer.strategy.init_args.tensor N they share each matrix
  --model.swap_images true            with validate: what is left when the pictures are swapped

python -m step37_lit fit -h           every option of a subcommand
python -m step37_lit fit --config RECIPE --print_config     the recipe in full
"""
