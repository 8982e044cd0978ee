"""PipeFusion at run time: its schedule, one rank's stage, what stages exchange, denoising loops."""
