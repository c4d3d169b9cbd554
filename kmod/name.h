/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_NAME_H
#define SNIFFER_NAME_H

#include "lookup.h"

void sniffer_name_socket(struct sniffer_flow *flow, struct sock *sk, u8 how);
void sniffer_name_out(struct sniffer_flow *flow, const struct nf_hook_state *state, bool trusted);

#endif /* SNIFFER_NAME_H */
