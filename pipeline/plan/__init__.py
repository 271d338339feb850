"""`deberta plan`: what a run needs of GPUs, from formulas, before anybody has a GPU.

    parameters       names and shapes of all parameters, in the networks' order
    sharding         what DeepSpeed's ZeRO stages keep of them on each rank
    activations      what the forward passes keep for their backward passes
    memory           the peak of one GPU, by part
    communication    bytes that the ranks send in a step
    devices          GPU types: memory, rates, links
    measurements     rates that somebody measured, as package data, and the model against them
    speed            seconds of a step
    storage          bytes of checkpoints and of data
    planning         all of it for one choice of settings
    search           the settings that fit and are fastest
    report           a plan for people, and as JSON
    tables           the proposal, and the choices that were tried

Nothing here imports torch: a plan takes a second, on any computer. Every figure says whether it is
measured, counted (exact for the code as it is, and held by tests) or modelled, and by what.
"""
