"""The API server from outside: a client, kubeconfig files, and objects of any kind."""
