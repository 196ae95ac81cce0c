"""Our environments in other people's trainers; a peer is imported only when it is used."""
