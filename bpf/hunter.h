/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_H
#define HUNTER_H
/* The maps, their content, and small helpers of all programs. */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#define SNIFFER_CDEF
#include "shared_proto.h"

#define OWNER_PAST	3	/* earlier users of a socket that are remembered */
#define SECOND		1000000000ULL
#define CPUS		1024

/* Identifies a process. */
struct key {
	u64 start;
	u32 tgid;
	u32 unused;
};

/*
 * What is known of one socket; see table.h. The names are those of
 * struct sniffer_owner in kmod/owner.h. Times are of CLOCK_MONOTONIC.
 */
struct owner {
	struct bpf_spin_lock lock;
	u32 tid;
	struct key user;	/* tgid 0: none */
	u64 via;
	u64 file;		/* address, 0 once it is released */
	u64 since;
	u64 dead;
	struct key past[OWNER_PAST];
	s32 fd;
	u32 creator;
	u16 flags;
	u8 via_how;
	u8 held;
	u8 many;
	u8 guess;
	u8 ring;
	u8 waits;
	u8 released;
	u8 servers;		/* accepted by a server of the kernel */
	u32 netns;
	u8 blind;		/* it may have another user, which nothing reports */
	u8 unused;
};

/* The same without the lock: new entries are copies of it. */
struct blank {
	u64 raw[sizeof(struct owner) / 8];
};

struct proc {
	u64 leader;		/* address of its first task; compare before use */
	u64 forked;
	u64 exit;
	u64 child;		/* address of the child of that fork */
	struct key child_key;
	u64 doubt;		/* until then one of its io_urings may drop files */
	u32 uid;
	u32 ring_numbers;	/* io_urings that it can use without a descriptor of them */
	u16 rings;		/* sockets that it had only through an io_uring */
	u8 ring_files;		/* it has put files into an io_uring */
	u8 blind;		/* it makes calls that nothing reports */
	u32 unused;
	char comm[SNIFFER_COMM_LEN];
};

/*
 * One processor's counters, which user space maps. records counts those of seq
 * and includes lost; packets = records - copies + skipped.
 */
struct counters {
	u64 seq;
	u64 copies;
	u64 skipped;
	u64 lost;
	u64 full;		/* sockets or processes without room */
	u64 woken;		/* when the reader was woken last */
	u64 calls;		/* of the first program of each pair, see out.h */
	u64 told;		/* packets that these pairs reported */
	u64 events_lost;	/* events of processes that had no room */
	u64 linked;		/* packets that Netfilter links were called for */
	u64 linked_calls;	/* calls of the first of a pair that a link made needless */
	u64 doubt;		/* until then an io_uring may drop files: sweeps shall look */
	u64 unused[4];		/* processors share no cache line */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct owner);
} owners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key);
	__type(value, struct proc);
} procs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CPUS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct counters);
} cpus SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct blank);
} blanks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 << 20);
} ring SEC(".maps");

/* Set before loading. */
const volatile u64 owner_keep = 2 * SECOND;
/* FIN_WAIT2 and TIME_WAIT take 60 s each; a connection may wait in a listener's queue */
const volatile u64 owner_keep_wait = 130 * SECOND;

/* true: only parts of the programs run */
#ifdef HUNTER_PARTS
enum { parts = true };
#else
enum { parts = false };
#endif

/* 6.1: a loop may not begin right behind a call */
#define APART() asm volatile("r0 = 0" ::: "r0", "memory")

#ifdef HUNTER_PARTS
/* Not every kernel tells it. The sender's descriptors are looked at in any case. */
static __always_inline bool in_task_only(struct task_struct *current)
{
	return true;
}
#else
extern const int __preempt_count __ksym __weak;
extern const struct pcpu_hot___x pcpu_hot __ksym __weak;

/* Does a task run here, and no softirq or interrupt? */
static __always_inline bool in_task_only(struct task_struct *current)
{
	struct task_struct___arm *arm = (void *)current;
	u32 count;

	if (bpf_core_field_exists(arm->thread_info.preempt_count))
		count = BPF_CORE_READ(arm, thread_info.preempt_count);
	else if (&pcpu_hot)
		count = ((struct pcpu_hot___x *)bpf_this_cpu_ptr(&pcpu_hot))->preempt_count;
	else if (&__preempt_count)
		count = *(int *)bpf_this_cpu_ptr(&__preempt_count);
	else
		return false;
	return !(count & 0x00ffff00);
}
#endif

static __always_inline struct counters *counters_here(u32 *cpu)
{
	*cpu = bpf_get_smp_processor_id() & (CPUS - 1);
	return bpf_map_lookup_elem(&cpus, cpu);
}

static __always_inline void count_full(void)
{
	struct counters *c;
	u32 cpu;

	c = counters_here(&cpu);
	if (c)
		__sync_fetch_and_add(&c->full, 1);
}

/* A pointer as a number. Global functions do not take pointers of the kernel. */
static __always_inline u64 address(const void *pointer)
{
	u64 number = 0;

	bpf_probe_read_kernel(&number, sizeof(number), &pointer);
	return number;
}

static __always_inline bool same(const struct key *a, const struct key *b)
{
	return a->tgid == b->tgid && a->start == b->start;
}

static __always_inline u64 file_refs(u64 file)
{
	struct file___ref *new = (void *)file;
	struct file___count *old = (void *)file;

	if (bpf_core_field_exists(new->f_ref))
		return BPF_CORE_READ(new, f_ref.refcnt.counter) + 1;
	return BPF_CORE_READ(old, f_count.counter);
}

/* The cookie of a socket of any kind, generated if it has none. sk: a typed pointer. */
#define COOKIE(sk) ({ \
	u64 cookie__ = (sk)->__sk_common.skc_cookie.counter; \
	cookie__ ?: bpf_get_socket_cookie((void *)(sk)); })

/* The same for an address; 0 if the socket has no cookie. */
static __always_inline u64 cookie_at(struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
}

/* Is this a socket that the table is about? sk: a typed pointer. */
static __always_inline bool wants(struct sock *sk)
{
	u16 family = sk->__sk_common.skc_family;
	u16 proto;

	if (family != AF_INET && family != AF_INET6)
		return false;
	if (BPF_CORE_READ_BITFIELD(sk, sk_kern_sock))
		return false;
	proto = sk->sk_protocol;
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_MPTCP ||
	       sk->sk_type == SOCK_RAW;
}

/* The same for an address. */
static __always_inline bool wants_at(struct sock *sk)
{
	u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);
	u16 proto;

	if (family != AF_INET && family != AF_INET6)
		return false;
	if (BPF_CORE_READ_BITFIELD_PROBED(sk, sk_kern_sock))
		return false;
	proto = BPF_CORE_READ(sk, sk_protocol);
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_MPTCP ||
	       BPF_CORE_READ(sk, sk_type) == SOCK_RAW;
}

/* The cookie of the socket behind a file's address, or 0. */
static __always_inline u64 file_cookie(u64 address)
{
	struct file *file = (void *)address;
	struct socket *sock;
	struct sock *sk;

	if ((BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) != S_IFSOCK)
		return 0;
	sock = BPF_CORE_READ(file, private_data);	/* NULL if it is only a path */
	sk = BPF_CORE_READ(sock, sk);
	return sk && wants_at(sk) ? cookie_at(sk) : 0;
}

#ifdef HUNTER_PARTS
#define KERNELS		(~0ULL)

/*
 * The cookie of a listener or of its MPTCP parent; KERNELS for a listener of the
 * kernel's own. The kernel copies it to each child.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, u64);
} listeners SEC(".maps");
#endif

#endif /* HUNTER_H */
