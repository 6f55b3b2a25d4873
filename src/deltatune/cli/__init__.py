"""The command line: one file per command, no logic. Heavy imports stay inside the commands, so that help is instant."""
