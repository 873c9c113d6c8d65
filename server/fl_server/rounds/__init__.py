"""From a launched run to its committed rounds: launcher, driver, one round, replies, and the app for the sites."""
