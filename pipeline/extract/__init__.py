"""Stage one: images -> features, through a frozen backbone, into a feature store."""
