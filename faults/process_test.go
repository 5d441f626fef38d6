package faults

const peerEnv, peerURL = "FAULTS_PEER", "FAULTS_URL"

func peer(role, url string) int { return 2 }
