"""A chain of SLURM jobs from one recipe: `deberta submit RECIPE` and `deberta status RUN`.

recipe      the TOML: which stages there are, and what each is given
site_file   slurm/site.env and the recipe's [site]: where jobs run
stages      a recipe as jobs: script, sbatch options, parameters, what must come before
rendering   a plain script of slurm/ and a job as the text that sbatch gets
checks      what can be known to be wrong before anything waits in a queue
client      sbatch, squeue, sacct and scontrol, and what they answer
record      RUN/slurm/jobs.json: which job does which stage
chain       write, check, submit, record
status      how the chain and the training stand, from the queue and from files
"""
