"""Methods that reuse or forecast what earlier steps of a run computed."""
