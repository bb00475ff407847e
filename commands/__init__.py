"""commands: what each subcommand of `qlora` does, a file each. They print; the rooms below them do not."""
