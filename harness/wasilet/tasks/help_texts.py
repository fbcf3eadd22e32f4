"""What the help of several tasks has in common."""

NAME_HELP = "the cluster (default: wasilet, or WASILET_NAME)"
OUTPUT_HELP = "text or json"
APP_HELP = "a sample's name or the path of a folder"
