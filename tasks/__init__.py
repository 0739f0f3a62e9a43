"""Task cards, one YAML file each: `glue/sst2.yaml` is the task `glue/sst2`."""
